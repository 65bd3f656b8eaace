"""The model card of a MultiMAE's encoder for one domain: README.md for the Hugging Face Hub."""

from mpmae.export.card import MMEARTH, citation, front_matter, licence_text, provenance_text
from mpmae.export.config import DomainEntry, MultiMAEExportConfig

_MULTIMAE_EO = """@inproceedings{sosa2025multimae,
  title = {{MultiMAE} Meets Earth Observation: Pre-training Multi-modal Multi-task Masked Autoencoders for Earth
           Observation Tasks},
  author = {Sosa, Jose and Rukhovich, Danila and Kacem, Anis and Aouada, Djamila},
  booktitle = {IEEE International Conference on Image Processing},
  year = {2025},
  eprint = {2505.14951},
  archivePrefix = {arXiv}
}"""
_MULTIMAE = """@inproceedings{bachmann2022multimae,
  title = {{MultiMAE}: Multi-modal Multi-task Masked Autoencoders},
  author = {Bachmann, Roman and Mizrahi, David and Atanov, Andrei and Zamir, Amir},
  booktitle = {European Conference on Computer Vision},
  year = {2022},
  eprint = {2204.01678},
  archivePrefix = {arXiv}
}"""
_TAGS = ["earth-observation", "remote-sensing", "masked-autoencoder", "vision-transformer", "timm"]


def multimae_card(config: MultiMAEExportConfig) -> str:
    """The text of README.md of a folder in timm's layout."""
    ((name, domain),) = config.domains_in.items()
    size = config.architecture
    summary = (
        f"A ViT (width {size.dim}, {size.depth} blocks, {config.num_heads} heads, patch size {config.patch_size} px) for "
        f"the domain {name}, taken from a MultiMAE. Its class token is the MultiMAE's global token; it has no final norm."
    )
    parts = [
        front_matter(config.licence, "timm", _TAGS, ["MMEarth"]),
        f"# {config.name}\n\n{summary}\n\n{licence_text(config.licence)}",
        f"## Load\n\n{_loading(config, domain)}",
        f"## Input\n\n{_input(config, domain)}",
        f"## Provenance\n\n{provenance_text(config.provenance)}",
        citation([_MULTIMAE_EO, _MULTIMAE, MMEARTH]),
    ]
    return "\n\n".join(parts) + "\n"


def _loading(config: MultiMAEExportConfig, domain: DomainEntry) -> str:
    side = config.img_size or 7 * config.patch_size
    return f"""```python
import timm
import torch

model = timm.create_model("hf-hub:USER/{config.name}", pretrained=True)  # or "local-dir:PATH" for this folder
tokens = model.forward_features(torch.randn(1, {len(domain.bands)}, {side}, {side}))  # the class token, then the patches
```

Needs `pip install timm`. For other image sizes give `img_size=`; timm then resizes the positions."""


def _input(config: MultiMAEExportConfig, domain: DomainEntry) -> str:
    if not config.statistics:
        rows = [f"| {i} | {band} |" for i, band in enumerate(domain.bands)]
        table = "\n".join([f"| channel | {domain.modality} band |", "|---|---|", *rows])
        return f"{table}\n\nThe band statistics were not recorded."
    titles = [f"{quantity}, {key}" for key in config.statistics for quantity in ("mean", "std")]
    rows = [f"| channel | {domain.modality} band | {' | '.join(titles)} |", "|---|---" + "|---" * len(titles) + "|"]
    for i, band in enumerate(domain.bands):
        numbers = [f"{value:.6g}" for entry in config.statistics.values() for value in (entry.mean[i], entry.std[i])]
        rows.append(f"| {i} | {band} | {' | '.join(numbers)} |")
    after = (
        "; then, per image, minus the mean over the standard deviation of its values between the 10th and 90th percentile"
        if domain.standardise
        else ""
    )
    return f"Raw units; the model expects (value - mean) / std{after}.\n\n" + "\n".join(rows)
