"""What is asked of every case. A check knows the contract, never a backend."""
