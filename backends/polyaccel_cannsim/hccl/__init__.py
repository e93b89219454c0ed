"""HCCL, simulated: each function of libhccl that torch_npu calls, carried by gloo between the processes of one host.

Signatures: Ascend/pytorch third_party/hccl/inc/hccl/hccl.h. Rules: cann/hccl
docs/zh/api_ref/comm_op_interface/*.md. A collective is queued on its stream and blocks that stream only, as on a card.
"""
