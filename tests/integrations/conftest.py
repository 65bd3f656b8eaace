"""The toolkits import torchvision when they are imported, which the test modules do at their top."""

from tests.cpu_torchvision import let_it_import

let_it_import()
