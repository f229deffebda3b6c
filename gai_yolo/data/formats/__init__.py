"""How data sets are written: COCO, YOLO and VOC; what is read becomes an index."""
