"""The cases of every operator and station of the contract."""
