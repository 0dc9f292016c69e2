"""train.sit under accelerate's FSDP2 on CPU processes; a program for torchrun, not a test.

accelerate 1.15 turns FSDP on for accelerators only and takes ACCELERATE_USE_FSDP on CPU processes as plain DDP. Its
code runs there all the same once it is told.
"""

import sys

import accelerate
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


class ShardedAccelerator(accelerate.Accelerator):
    """What accelerate makes of ACCELERATE_USE_FSDP, FSDP_VERSION=2 and the block's class on a GPU."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["SiTTransformerBlock"],
            cpu_ram_efficient_loading=False,
        )

    def prepare(self, *parts, **options):
        prepared = super().prepare(*parts, **options)
        from torch.distributed.tensor import DTensor

        assert all(isinstance(parameter, DTensor) for parameter in prepared[0].parameters())
        return prepared


if __name__ == "__main__":
    accelerate.Accelerator = ShardedAccelerator  # type: ignore[misc]
    from train import sit

    sys.exit(sit.main(sys.argv[1:]))
