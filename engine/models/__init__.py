"""Architectures: configuration files in, modules with Hugging Face names out."""
