"""The Ascend backend: torch_npu's fused operators, grouped matmul for adapters, HCCL, NPU graphs.

Nothing of torch_npu is imported before a device is asked for: the package may be installed on a host without CANN.
"""
