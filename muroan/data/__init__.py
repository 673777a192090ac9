"""Datasets: raw examples, the samples and batches made of them, and one file a dataset."""
