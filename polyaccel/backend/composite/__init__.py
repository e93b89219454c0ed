"""Every operator and every storage class of the contract in plain torch.

They run on any torch device, in eager mode, with aten operators only, and read nothing back from the device inside an
operator: shapes and loop counts come from the step's host arrays. Backends use them where they have nothing better, and
may subclass the storage classes.
"""
