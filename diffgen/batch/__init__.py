"""Many pictures: a frozen plan, cut into shards; each shard is made whole by any engine, and can be trained on."""
