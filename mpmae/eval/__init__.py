"""What pretrained features are good for: labelled sets, probes, fine-tuning, segmentation, embeddings."""
