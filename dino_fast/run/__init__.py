"""What surrounds the training loop: schedules, logs, health, signals, checkpoints."""
