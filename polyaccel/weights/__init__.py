"""Reading checkpoints: Hugging Face folders with safetensors, and GGUF files. Nothing here writes or downloads."""
