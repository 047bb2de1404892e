"""The models. They know no device, gin file, dataset or distribution."""
