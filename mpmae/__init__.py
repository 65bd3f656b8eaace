"""mpmae: pretrain masked autoencoders on Earth-observation data at scale."""

__version__ = "0.1.0"
