"""Config groups for solo-learn: `+logo=byol`, `augmentations=logo_imagenet`."""
