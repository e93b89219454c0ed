"""What can be known of a backend before the first case: found, loaded, its devices' facts, what they lack."""
