"""Fine-tuning for classes of whole images: pooled features, a final norm and a linear layer.

Shapes: N samples, M windows of a batch, T windows of an image, B input bands, S image side in pixels, K classes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mpmae.engine.optim import layer_decay_groups
from mpmae.errors import ConfigError
from mpmae.eval.augment import Augment
from mpmae.eval.dataset import Task
from mpmae.eval.encoders import ImageEncoder
from mpmae.eval.finetune_config import FinetuneConfig, FinetuneSection
from mpmae.eval.training_data import Batch, Example
from mpmae.models import ConvNeXtV2
from mpmae.models.multimae.backbone import MultiMAEViT


@dataclass
class ClassificationSetup:
    """What `mpmae.eval.training.fit` needs for one or several classes per image: see `mpmae.eval.training.Setup`.

    The scores of an image are the mean over its windows of softmax or, for several classes, of sigmoid.
    """

    task: Task
    model: ConvNeXtV2 | MultiMAEViT
    preparation: Callable[[np.ndarray], Tensor]
    change: Augment
    section: FinetuneSection
    prepares_alike = True

    @property
    def method(self) -> str:
        """For scores."""
        return "finetune-head" if self.section.freeze else "finetune"

    def prepare(self, image: np.ndarray, label: np.ndarray) -> tuple[Tensor, Tensor]:
        """The windows of an image, each with the image's target: a class [T], or labels [T, K]."""
        images = self.preparation(image)
        target = torch.as_tensor(np.asarray(label))
        return images, target.expand(len(images), *target.shape)

    def begin_epoch(self, epoch: int) -> list[dict[str, Any]]:
        """All parameters from the first epoch on, or the classifier's."""
        if epoch:
            return []
        if self.section.freeze:
            self.model.requires_grad_(False)
            self.model.head.requires_grad_(True)
        section = self.section
        quirks = section.reference_quirks
        return layer_decay_groups(self.model, section.weight_decay, section.layer_decay, reference_quirks=quirks)

    def augment(self, batch: Batch, epoch: int) -> Batch:
        """See `mpmae.eval.augment.Augment`."""
        return self.change(batch, epoch)

    def loss(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy, or the mean over classes of binary cross entropy, summed over windows; M."""
        logits = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        number = torch.tensor(float(len(outputs)))
        if self.task.kind == "multilabel":
            each = F.binary_cross_entropy_with_logits(logits, targets.to(logits), reduction="none")
            return each.mean(1).sum(), number
        targets = targets.to(logits) if targets.is_floating_point() else targets
        return F.cross_entropy(logits, targets, reduction="sum"), number

    def predict(self, outputs: Tensor, examples: Sequence[Example]) -> Iterator[tuple[Tensor, Tensor]]:
        """(scores [N, K], classes [N] or labels [N, K]), all at once."""
        shares = outputs.sigmoid() if self.task.kind == "multilabel" else outputs.softmax(1)
        windows = shares.split([len(example.images) for example in examples])
        labels = torch.from_numpy(np.stack([np.asarray(example.label) for example in examples]))
        yield torch.stack([window.mean(0) for window in windows]), labels


def classification_setup(
    config: FinetuneConfig, task: Task, encoder: ImageEncoder, preparation: Callable[[np.ndarray], Tensor], seed: int
) -> ClassificationSetup:
    """The setup of a run; `encoder` becomes its model. seed: of the classifier's weights and of augmentation.

    The classifier starts with a spread of 0.02 times `finetune.head_init_scale` and bias 0. Raises ConfigError.
    """
    section = config.finetune
    if section.freeze and section.drop_path:
        raise ConfigError("finetune.drop_path: a frozen encoder skips no blocks; leave it out, or set finetune.freeze=false")
    model = encoder.backbone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.reset_classifier(task.num_classes)
    with torch.no_grad():
        model.head.weight.mul_(section.head_init_scale)
    return ClassificationSetup(task, model, preparation, Augment(config.augment, task, seed, encoder.input), section)
