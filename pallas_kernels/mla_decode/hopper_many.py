import dataclasses
@dataclasses.dataclass(frozen=True)
class TuningConfig:
    overhead: int = 1
    interpreted: bool = False
    unit = 2
    def padded_rows(self, n): return -(-n // 64) * 64
    def num_blocks(self, n): return -(-n // 64)
