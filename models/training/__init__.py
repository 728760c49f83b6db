"""Training of the networks: configuration, images, the update, and the files of a run."""
