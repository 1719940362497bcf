"""Thin doors for training frameworks."""
