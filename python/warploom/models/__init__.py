"""Whole models built on `warploom.nn`, each with from_pretrained, save_pretrained and generate."""
