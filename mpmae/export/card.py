"""The model card of an export: README.md for the Hugging Face Hub."""

import json

import yaml

from mpmae.export.config import ExportConfig, Provenance

MMEARTH = """@inproceedings{nedungadi2024mmearth,
  title = {{MMEarth}: Exploring Multi-Modal Pretext Tasks for Geospatial Representation Learning},
  author = {Nedungadi, Vishal and Kariryaa, Ankit and Oehmcke, Stefan and Belongie, Serge and Igel, Christian and
            Lang, Nico},
  booktitle = {European Conference on Computer Vision},
  year = {2024},
  eprint = {2405.02771},
  archivePrefix = {arXiv}
}"""
_CONVNEXT = """@inproceedings{woo2023convnextv2,
  title = {{ConvNeXt V2}: Co-designing and Scaling {ConvNets} with Masked Autoencoders},
  author = {Woo, Sanghyun and Debnath, Shoubhik and Hu, Ronghang and Chen, Xinlei and Liu, Zhuang and Kweon, In So and
            Xie, Saining},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2023},
  eprint = {2301.00808},
  archivePrefix = {arXiv}
}"""


def model_card(config: ExportConfig, *, with_timm: bool) -> str:
    """The text of README.md; with_timm: the folder is in timm's layout, else in that of torch.hub."""
    parts = [_header(config, with_timm), f"# {config.name}\n\n{_summary(config)}"]
    parts += [f"## Load\n\n{_loading(config, with_timm)}", f"## Input\n\n{_input(config)}"]
    if config.modalities_out:
        rows = [f"| {name} | {channels} |" for name, channels in config.modalities_out.items()]
        parts.append("## Pretraining targets\n\n" + "\n".join(["| modality | channels |", "|---|---|", *rows]))
    parts.append(f"## Provenance\n\n{provenance_text(config.provenance)}")
    sources = ([MMEARTH] if _is_mmearth(config) else []) + [_CONVNEXT]
    parts.append(citation(sources))
    return "\n\n".join(parts) + "\n"


def citation(sources: list[str]) -> str:
    """The section with these BibTeX entries."""
    return "## Citation\n\n```bibtex\n" + "\n\n".join(sources) + "\n```"


def _is_mmearth(config: ExportConfig) -> bool:
    return bool(config.modalities_out) or config.provenance.scheme.startswith("mmearth")


def front_matter(licence: str | None, library: str, tags: list[str], datasets: list[str]) -> str:
    """The head of README.md that the Hugging Face Hub reads."""
    head = {"license": licence.lower()} if licence else {}
    head |= {"library_name": library, "pipeline_tag": "image-feature-extraction", "tags": tags}
    head |= {"datasets": datasets} if datasets else {}
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---"


def _header(config: ExportConfig, with_timm: bool) -> str:
    ours = ["earth-observation", "remote-sensing", "masked-autoencoder"] if _is_mmearth(config) else []
    tags = [*ours, "convnextv2", *(["timm"] if with_timm else [])]
    library = "timm" if with_timm else "pytorch"
    return front_matter(config.licence, library, tags, ["MMEarth"] if _is_mmearth(config) else [])


def _summary(config: ExportConfig) -> str:
    size = config.architecture.name or "ConvNeXt V2"
    stem = "the original stem" if config.stem == "convnext" else "the stem of MMEarth"
    lines = [f"{size} with {stem}, patch size {config.patch_size} px, {config.in_chans} input bands"]
    if config.modalities_out:
        lines.append(f", pretrained with MP-MAE to reconstruct {', '.join(config.modalities_out)}")
    if config.num_classes:
        lines.append(f", with a classifier of {config.num_classes} classes")
    return f"{''.join(lines)}.\n\n{licence_text(config.licence)}"


def licence_text(licence: str | None) -> str:
    """One sentence."""
    return f"Licence: {licence}." if licence else "No licence has been stated for these weights."


def _loading(config: ExportConfig, with_timm: bool) -> str:
    side = config.img_size or 7 * config.patch_size
    if with_timm:
        code = f"""import timm
import torch

model = timm.create_model("hf-hub:USER/{config.name}", pretrained=True)  # or "local-dir:PATH" for this folder
features = model.forward_features(torch.randn(1, {config.in_chans}, {side}, {side}))"""
        needs = "`pip install timm`"
    else:
        code = f"""import torch
from huggingface_hub import snapshot_download

folder = snapshot_download("USER/{config.name}")  # or the path of this folder
model = torch.hub.load(folder, "encoder", source="local")
features = model.forward_features(torch.randn(1, {config.in_chans}, {side}, {side}))"""
        needs = "`pip install torch safetensors huggingface_hub`; the model's code is `mpmae_convnextv2.py` in this folder"
    text = f"```python\n{code}\n```\n\nNeeds {needs}."
    if config.architecture.name:
        text += f' With mpmae: `mpmae.create_encoder("{config.architecture.name}", checkpoint="path/to/this/folder")`.'
    return text


def _input(config: ExportConfig) -> str:
    if config.bands_in is None:
        return f"{config.in_chans} channels; which bands they are was not recorded."
    levels = config.statistics or {}
    if not levels:
        rows = [f"| {i} | {band} |" for i, band in enumerate(config.bands_in)]
        return (
            "\n".join(["| channel | Sentinel-2 band |", "|---|---|", *rows]) + "\n\nThe band statistics were not recorded."
        )
    titles = [f"{quantity}, {level}" for level in levels for quantity in ("mean", "std")]
    rows = [f"| channel | Sentinel-2 band | {' | '.join(titles)} |", "|---|---" + "|---" * len(titles) + "|"]
    for i, band in enumerate(config.bands_in):
        numbers = [f"{value:.6g}" for entry in levels.values() for value in (entry.mean[i], entry.std[i])]
        rows.append(f"| {i} | {band} | {' | '.join(numbers)} |")
    text = "Raw units (reflectance x 10,000); the model expects (value - mean) / std by the statistics of the product level."
    return f"{text}\n\n" + "\n".join(rows)


def provenance_text(facts: Provenance) -> str:
    """Where the weights come from, as a list."""
    lines = [f"- source: `{facts.source}`, SHA-256 `{facts.source_sha256}`, naming `{facts.scheme}`"]
    lines += [f"- step {facts.step} of the pretraining"] if facts.step is not None else []
    lines += [f"- shard set: fingerprint `{facts.shards_fingerprint}`"] if facts.shards_fingerprint else []
    lines.append(
        f"- exported {facts.date} by mpmae {facts.mpmae_version} (commit {facts.commit}), torch {facts.torch_version}"
    )
    lines += [f"- {note}" for note in facts.notes]
    text = "\n".join(lines)
    if facts.run_config:
        text += f"\n\n```json\n{json.dumps(facts.run_config, indent=1)}\n```"
    return text
