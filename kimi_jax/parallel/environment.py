"""Settings of the environment that make NCCL copy by the GPUs' copy engines.

They are read when JAX first touches a device, so they are set before. Multicast over NVLink stays off
with them: NCCL would use it to synchronise such copies.
"""

COPY_ENGINES = {"NCCL_CTA_POLICY": "ZERO", "NCCL_NVLS_ENABLE": "0"}
XLA_COPY_ENGINES = "--xla_gpu_experimental_enable_nccl_symmetric_buffers=true"
