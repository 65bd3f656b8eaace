"""MultiMAE for Earth observation: a ViT that takes any subset of domains, views of the modalities, and reconstructs them."""
