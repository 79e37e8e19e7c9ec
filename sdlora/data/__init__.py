"""A folder of captioned pictures, as frozen records and tensors."""
