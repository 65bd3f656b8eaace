"""What is trained: the configuration's section `model`, one kind for each family of models, told by `model.name`.

Names, meanings and defaults are those of `mpmae.models.create_mpmae` and `create_multimae`.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

from mpmae.config_tree import Float, Int, Section, Text
from mpmae.domains import PUBLISHED_DOMAINS, modalities_of
from mpmae.modalities import TARGETS

MULTIMAE = "multimae"


def _one_error(kind: str, message: str) -> WrapValidator:
    """One error instead of one for each member of a union."""

    def validate(value: Any, validate_union: Any) -> Any:
        try:
            return validate_union(value)
        except ValidationError:
            raise PydanticCustomError(kind, message) from None

    return WrapValidator(validate)


Targets = Annotated[
    dict[str, tuple[str, ...] | None] | tuple[str, ...],
    _one_error(
        "names_or_bands",
        "expected names, as in [sentinel2, biome], or names with their bands, as in {sentinel2: [B4, B3], biome: null}",
    ),
]
Positive = Annotated[Float, Field(gt=0)]
Alphas = Annotated[
    Positive | dict[str, Positive],
    _one_error("alpha_or_alphas", "expected a number above 0, or one for each input domain, as in {rgb: 1.0, depth: 0.5}"),
]


class MPMAESection(Section):
    """An MP-MAE."""

    name: Text = "mpmae_atto"
    img_size: Int = Field(56, gt=0)
    patch_size: Int = Field(8, gt=0)
    bands_in: tuple[str, ...] | None = Field(None, description="Sentinel-2 bands the encoder reads; None: all but B10")
    modalities_out: Targets = Field(TARGETS, description="as names or as {name: bands or null}")
    mask_ratio: Float = Field(0.6, gt=0, lt=1)
    encoder: Literal["sparse", "dense"] = "sparse"
    stem: Literal["mmearth", "convnext"] = "mmearth"
    loss_weighting: Literal["uncertainty", "unweighted"] = "uncertainty"
    norm_pix_loss: bool = True
    decoder_dim: Int = Field(512, gt=0)
    decoder_depth: Int = Field(1, gt=0)
    grn_scope: Literal["sample", "batch"] | None = Field(None, description="None: batch with reference_quirks, else sample")
    gelu: Literal["erf", "tanh", "poly"] = Field("erf", description="erf is exact; poly and tanh take fewer instructions")
    init: Literal["reference", "convnextv2"] = "convnextv2"
    reference_quirks: bool = False

    @property
    def modalities(self) -> tuple[str, ...]:
        """What a batch must hold."""
        return tuple(dict.fromkeys(("sentinel2", *self.modalities_out)))

    @property
    def loader_quirks(self) -> bool:
        """Whether the loader, too, does what the published code does."""
        return self.reference_quirks


class MultiMAESection(Section):
    """A MultiMAE."""

    name: Text = "multimae_base"
    img_size: Int = Field(56, gt=0)
    patch_size: Int = Field(8, gt=0)
    domains_in: tuple[str, ...] = Field(PUBLISHED_DOMAINS, description="what the encoder may see")
    domains_out: tuple[str, ...] = Field(PUBLISHED_DOMAINS, description="what is reconstructed")
    num_visible_tokens: Int | None = Field(None, gt=0, description="of a sample, over all domains; None: a sixth of all")
    alphas: Alphas = Field(1.0, description="of the Dirichlet distribution over the domains, one or {name: alpha}")
    sample_domains_uniformly: bool = Field(False, description="tokens of a random subset of the domains only")
    extra_norm_rgb: bool | None = Field(None, description="one more decoder, for rgb normalised per patch; None: with rgb")
    loss_weighting: Literal["unweighted", "uncertainty"] = "unweighted"
    decoder_dim: Int = Field(128, gt=0)
    decoder_depth: Int = Field(2, ge=0)
    decoder_num_heads: Int = Field(8, gt=0)
    reference_quirks: bool = False

    @property
    def modalities(self) -> tuple[str, ...]:
        """What a batch must hold. Raises ConfigError for a name of no domain."""
        return modalities_of((*self.domains_in, *self.domains_out))

    @property
    def loader_quirks(self) -> bool:
        """Whether the loader, too, does what the published code does: the model has all of that itself."""
        return False


def _family(value: Any) -> str:
    """Which kind of section a plain tree or a section is."""
    if isinstance(value, Section):
        return MULTIMAE if isinstance(value, MultiMAESection) else "mpmae"
    name = value.get("name") if isinstance(value, dict) else None
    return MULTIMAE if isinstance(name, str) and name.startswith(MULTIMAE) else "mpmae"


ModelSection = Annotated[
    Annotated[MPMAESection, Tag("mpmae")] | Annotated[MultiMAESection, Tag(MULTIMAE)], Discriminator(_family)
]
