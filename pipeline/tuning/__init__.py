"""Fine-tuning: the network cut in two, what feeds its end, settings, checkpoints, the parity gate."""
