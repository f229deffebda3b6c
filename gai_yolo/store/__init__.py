"""Bytes that survive; knows no torch."""
