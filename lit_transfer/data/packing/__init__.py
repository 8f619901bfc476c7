"""From pictures to a packed dataset: what `lit-transfer prepare` does, in the order sources, labels, splits, shards."""
