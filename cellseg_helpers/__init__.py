"""Training, prediction and evaluation code behind the cell instance segmentation study."""
