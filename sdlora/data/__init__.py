"""A folder of captioned images, as frozen records and tensors."""
