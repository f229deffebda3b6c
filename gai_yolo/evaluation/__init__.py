"""COCO evaluation, sharded over ranks."""
