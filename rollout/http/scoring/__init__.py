"""Requests that sample nothing: embeddings, scores of texts, labels, and what ranks by them."""
