MultiCropCollate = None
