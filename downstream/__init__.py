"""What fine-tuning is made of: settings, backbones, detection, segmentation, exported files."""
