"""The configuration of a probe: `load_tree(ProbeConfig, path, overrides)`."""

from typing import Annotated, Literal

from pydantic import Field

from mpmae.config_tree import Float, Int, Section, TextPath
from mpmae.eval.config import DatasetSection, EncoderSection, ImageSection, InputsSection, OutputSection

Count = Annotated[Int, Field(gt=0)]
Positive = Annotated[Float, Field(gt=0)]
NotNegative = Annotated[Float, Field(ge=0)]


class ProbeSection(Section):
    """What is computed from the features."""

    methods: tuple[Literal["knn", "ridge", "lbfgs", "adamw", "sgd"], ...] = Field(
        ("knn", "ridge", "lbfgs", "adamw"), min_length=1, description="knn, and the solvers of the linear probe"
    )
    ks: tuple[Count, ...] = Field((5, 20), min_length=1, description="numbers of neighbours")
    strengths: tuple[Positive, ...] = Field(
        (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0), min_length=1, description="of the L2 penalty: ridge and lbfgs"
    )
    lrs: tuple[Positive, ...] = Field((3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), min_length=1, description="peak rates: adamw")
    sgd_lrs: tuple[Positive, ...] = Field((1e-3, 1e-2, 1e-1, 1.0), min_length=1, description="peak rates: sgd")
    weight_decays: tuple[NotNegative, ...] = Field((0.0, 1e-2, 1e-1), min_length=1, description="adamw and sgd")
    epochs: Int = Field(100, gt=0, description="adamw and sgd")
    batch_size: Int = Field(256, gt=0, description="adamw and sgd; smaller sets are one batch")
    fit_with_val: bool = Field(False, description="once the settings are chosen, fit them anew on train and val together")
    baselines: tuple[Literal["random_init", "image_statistics", "random_convolutions"], ...] = Field(
        ("random_init", "image_statistics", "random_convolutions"), description="what is shown beside the encoder"
    )
    features_dir: TextPath | None = Field(None, description="where features are kept; None: output.dir/features")


class ProbeConfig(Section):
    """A whole evaluation."""

    output: OutputSection = OutputSection()
    dataset: DatasetSection = DatasetSection()
    encoder: EncoderSection = EncoderSection()
    image: ImageSection = ImageSection()
    inputs: InputsSection = InputsSection()
    probe: ProbeSection = ProbeSection()
