"""The toolkits import torchvision when they are imported, which the test modules do at their top."""

from mpmae.eval.torchvision_import import let_torchvision_import

let_torchvision_import()
