"""What a dataset is, how it is packed, in which order it is read, and how bytes become pixels."""
