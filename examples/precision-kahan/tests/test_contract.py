"""The contract, which is all that it takes to be a plugin."""

from precision_kahan import KahanPrecision

from precision_core.testing import PrecisionContract


class TestKahan(PrecisionContract):
    def make_precision(self) -> KahanPrecision:
        return KahanPrecision()


class TestKahanWithExceptions(TestKahan):
    def make_precision(self) -> KahanPrecision:
        return KahanPrecision("bf16-kahan; *.norm: params=bfloat16,output=bfloat16")
