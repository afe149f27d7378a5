"""Runs the Python of Gluon kernels on CPU tensors, and fails where a GPU might read too early.

`load` executes a file with stand-ins for Gluon, so that neither a GPU nor Triton's compiler is
needed; its functions then launch kernels on tensors in main memory, program by program. All numbers
are fp32, whatever the kernels say, so that results can be held to a plain reference in fp32.

What runs by itself on a GPU is done as late as the kernel allows. A copy into shared memory fills
its place with NaN and brings the numbers when `wait_group` waits for it. A product has a result
when `warpgroup_mma_wait` has waited for it, and its factors must be what they were at its begin.
`Hazard` is raised, by name, for

- what is read in shared memory, or handed to a product, before it has come, or without a barrier,
  and for products a fence, between the writing and the reading;
- what is written in shared memory while a copy or a product is under way there, or without a
  barrier behind its last reader;
- registers of a product that the wait for it does not name, which a compiler may use again;
- an address outside a tensor, and a number stored twice (outputs are NaN before);
- anything still under way at the end.

Threads do not exist here: a barrier counts for all. Layouts are not looked at; a compiler does that
(`compile_worker`). Neither can show that a GPU does what its manual says.
"""

import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

GLUON = "triton.experimental.gluon"
# Types, as far as they differ here.
FLOAT, SHORT_FLOAT, INT, LONG = "float32", "bfloat16", "int32", "int64"


class Hazard(AssertionError):
    """What a GPU does not promise to do as it was meant."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise Hazard(what)


def raw(value: Any) -> Any:
    return value.tensor if isinstance(value, Value) else value


def tensor(value: Any) -> Tensor:
    return torch.as_tensor(raw(value))


class Value:
    """A scalar or tensor in registers."""

    def __init__(self, value: Any) -> None:
        self.tensor = torch.as_tensor(value)

    def to(self, dtype: str, bitcast: bool = False) -> "Value":
        if bitcast:
            return Value(self.tensor.to(torch.int32).view(torch.float32))
        whole = dtype in (INT, LONG)
        return Value(self.tensor.to(torch.int64 if whole else torch.float32))

    def __getitem__(self, key: Any) -> "Value":
        return Value(self.tensor[key])

    def __index__(self) -> int:
        return int(self.tensor)


def _operator(name: str) -> None:
    function = getattr(operator, name)

    def forward(self: Value, other: Any) -> Value:
        if isinstance(other, Pointer):
            return NotImplemented
        return Value(function(self.tensor, raw(other)))

    def backward(self: Value, other: Any) -> Value:
        return Value(function(tensor(other), self.tensor))

    plain = name.strip("_")
    setattr(Value, f"__{plain}__", forward)
    setattr(Value, f"__r{plain}__", backward)


for _name in ("add", "sub", "mul", "mod", "floordiv", "truediv", "and_", "or_"):
    _operator(_name)
for _name in ("lt", "gt", "le", "ge", "eq"):
    _operator(_name)


@dataclass
class Pointer:
    """Places in a tensor, perhaps outside of it as long as nobody goes there."""

    base: Tensor
    offset: Any = 0

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.base, self.offset + raw(other))

    def _places(self, mask: Any) -> tuple[Tensor, Tensor]:
        places = torch.as_tensor(self.offset)
        mask = torch.broadcast_to(tensor(True if mask is None else mask), places.shape)
        inside = (places >= 0) & (places < self.base.numel())
        require(bool((inside | ~mask).all()), "an address outside its tensor")
        return torch.where(mask, places, 0), mask

    def load(self, mask: Any = None, other: Any = 0) -> Value:
        places, mask = self._places(mask)
        other = torch.as_tensor(other, dtype=self.base.dtype)
        return Value(torch.where(mask, self.base[places], other))

    def store(self, value: Any, mask: Any = None) -> None:
        places, mask = self._places(mask)
        places = places[mask]
        require(bool(self.base[places].isnan().all()), "a number stored twice")
        self.base[places] = tensor(value).expand(mask.shape)[mask].to(self.base.dtype)


@dataclass
class Place:
    """A block of shared memory, and when it was last written and read."""

    tensor: Tensor
    written: int = 0
    read: int = 0
    arriving: bool = False
    products: int = 0


@dataclass(eq=False)
class Product:
    """An accumulator, and the product on its way to it."""

    factors: tuple[Any, Any]
    added_to: "Product | Value | None"
    begun: Tensor
    value: Tensor | None = None

    def finish(self) -> None:
        left, right = (_numbers(factor) for factor in self.factors)
        same = torch.equal(self.begun.nan_to_num(7), (left @ right).nan_to_num(7))
        require(same, "a factor changed during its product")
        before = self.added_to.value if isinstance(self.added_to, Product) else raw(self.added_to)
        self.value = self.begun if before is None else self.begun + before


@dataclass
class Program:
    """What one program has under way."""

    number: int
    clock: int = 0
    fence: int = 0
    barrier: int = 0
    copies: list[tuple[Place, Tensor]] = field(default_factory=list)
    groups: list[list[tuple[Place, Tensor]]] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)

    def tick(self) -> int:
        self.clock += 1
        return self.clock


class Shared:
    """A ring of places in shared memory, one of them, or that one transposed."""

    def __init__(self, run: "Run", places: list[Place], at: int = 0, turned: bool = False) -> None:
        self.run, self.places, self.at, self.turned = run, places, at, turned

    def index(self, at: Any) -> "Shared":
        return Shared(self.run, self.places, int(at))

    def permute(self, order: tuple[int, int]) -> "Shared":
        assert order == (1, 0)
        return Shared(self.run, self.places, self.at, not self.turned)

    @property
    def place(self) -> Place:
        return self.places[self.at]

    def numbers(self) -> Tensor:
        return self.place.tensor.T if self.turned else self.place.tensor

    def load(self, layout: Any) -> Value:
        place, program = self.place, self.run.program
        require(not place.arriving, "shared memory read before its copy has come")
        require(place.written <= program.barrier, "shared memory read without a barrier")
        place.read = program.tick()
        return Value(self.numbers().clone())

    def store(self, value: Value) -> None:
        self.vacate()
        self.place.tensor.copy_(value.tensor)
        self.place.written = self.run.program.tick()

    def vacate(self) -> None:
        """See that nobody needs any more what lies here."""
        place = self.place
        require(not place.arriving, "shared memory written under a copy")
        require(place.products == 0, "shared memory written under a product")
        require(
            place.read <= self.run.program.barrier, "shared memory written before all have read"
        )


def _numbers(factor: Any) -> Tensor:
    return factor.numbers() if isinstance(factor, Shared) else raw(factor)


class Run:
    """Gluon's functions, for the program that runs just now."""

    program: Program

    # Products.

    def warpgroup_mma(
        self, a: Any, b: Any, acc: Any, *, use_acc: bool = True, is_async: bool
    ) -> Product:
        assert is_async
        for factor in (a, b):
            if isinstance(factor, Shared):
                place, program = factor.place, self.program
                require(not place.arriving, "a factor that has not come")
                fenced = place.written <= program.fence <= program.barrier
                require(fenced, "a factor without a fence and a barrier behind its writing")
                place.products += 1
        product = Product((a, b), acc if use_acc else None, _numbers(a) @ _numbers(b))
        self.program.products.append(product)
        return product

    def warpgroup_mma_wait(self, left: int, deps: Sequence[Any]) -> Any:
        named = set(map(id, deps))
        while len(self.program.products) > left:
            product = self.program.products.pop(0)
            product.finish()
            for factor in product.factors:
                if isinstance(factor, Shared):
                    factor.place.products -= 1
                    factor.place.read = self.program.tick()
                else:
                    require(id(factor) in named, "registers of a product that its wait lets go")
        for one in deps:
            done = not isinstance(one, Product) or one.value is not None
            require(done, "a product's result before its wait")
        values = [Value(one.value) if isinstance(one, Product) else one for one in deps]
        return values[0] if len(values) == 1 else tuple(values)

    # Copies, fences and barriers.

    def copy(self, slot: Shared, source: Pointer, mask: Any = None) -> None:
        slot.vacate()
        slot.place.arriving = True
        slot.place.tensor.fill_(float("nan"))
        self.program.copies.append((slot.place, source.load(mask).tensor))

    def commit_group(self) -> None:
        self.program.groups.append(self.program.copies)
        self.program.copies = []

    def wait_group(self, left: int) -> None:
        while len(self.program.groups) > left:
            for place, numbers in self.program.groups.pop(0):
                place.tensor.copy_(numbers)
                place.arriving, place.written = False, self.program.tick()

    def fence_async_shared(self) -> None:
        self.program.fence = self.program.tick()

    def thread_barrier(self) -> None:
        self.program.barrier = self.program.tick()

    # Memory and numbers.

    def allocate_shared_memory(self, dtype: str, shape: list[int], layout: Any) -> Shared:
        *ring, _, _ = shape if dtype == SHORT_FLOAT else [*shape, 1]
        sizes = shape[len(ring) :]
        places = [Place(torch.full(sizes, float("nan"))) for _ in range(ring[0] if ring else 1)]
        return Shared(self, places)

    def language(self) -> SimpleNamespace:
        def pairwise(function: Callable[..., Tensor]) -> Callable[..., Value]:
            return lambda a, b, propagate_nan=None: Value(function(tensor(a), tensor(b)))

        def anything(*_: Any, **__: Any) -> None:
            return None

        layouts = ("NVMMADistributed", "Blocked", "Slice", "DotOperand", "NVMMAShared")
        return SimpleNamespace(
            **{f"{name}Layout": anything for name in (*layouts, "SwizzledShared")},
            float32=FLOAT,
            bfloat16=SHORT_FLOAT,
            int32=INT,
            int64=LONG,
            constexpr=lambda value: value,
            program_id=lambda _: Value(self.program.number),
            arange=lambda begin, end, layout: Value(torch.arange(begin, end)),
            zeros=lambda shape, dtype, layout: Value(torch.zeros(shape)),
            minimum=pairwise(torch.minimum),
            maximum=pairwise(torch.maximum),
            where=lambda test, a, b: Value(torch.where(tensor(test), tensor(a), tensor(b))),
            load=lambda at, mask=None, other=0: at.load(mask, other),
            store=lambda at, value, mask=None: at.store(value, mask),
            sum=lambda x, axis: Value(x.tensor.sum(axis)),
            max=lambda x, axis: Value(x.tensor.amax(axis)),
            exp2=lambda x: Value(x.tensor.exp2()),
            log2=lambda x: Value(x.tensor.log2()),
            abs=lambda x: Value(x.tensor.abs()),
            convert_layout=lambda x, layout: Value(x.tensor),
            reshape=lambda x, shape: Value(x.tensor.reshape(shape)),
            permute=lambda x, order: Value(x.tensor.permute(order)),
            split=lambda x: tuple(map(Value, x.tensor.unbind(-1))),
            join=lambda a, b: Value(torch.stack([a.tensor, b.tensor], -1)),
            inline_asm_elementwise=lambda code, constraints, args, **_: args[0],
            allocate_shared_memory=self.allocate_shared_memory,
            thread_barrier=self.thread_barrier,
        )

    def jit(self, function: Callable[..., Any] | None = None, **_: Any) -> Any:
        return self.jit if function is None else Kernel(self, function)


@dataclass
class Kernel:
    """A function of the device: called by another one, or launched."""

    run: Run
    function: Callable[..., Any]

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.function(*args, **options)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(
            *args: Any, num_warps: int, maxnreg: int | None = None, **constants: int
        ) -> None:
            for number in range(grid[0]):
                self.run.program = program = Program(number)
                self.function(*map(_argument, args), **constants)
                done = not (program.products or program.copies or program.groups)
                require(done, "something is under way at the end")

        return launch


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Pointer(value.view(-1))
    return Value(value) if isinstance(value, int) else value


def _range(begin: Any, end: Any) -> Iterator[Value]:
    return map(Value, range(int(begin), int(end)))


def load(path: Path, change: Callable[[str], str] = lambda source: source) -> ModuleType:
    """The module in a file of Gluon kernels, its source changed, on these stand-ins."""
    run = Run()
    async_copy = SimpleNamespace(
        async_copy_global_to_shared=run.copy,
        commit_group=run.commit_group,
        wait_group=run.wait_group,
    )
    hopper = SimpleNamespace(
        async_copy=async_copy,
        fence_async_shared=run.fence_async_shared,
        warpgroup_mma=run.warpgroup_mma,
        warpgroup_mma_wait=run.warpgroup_mma_wait,
    )
    language = run.language()
    gluon = SimpleNamespace(language=language, jit=run.jit)
    stand_ins = {
        "triton.experimental": SimpleNamespace(gluon=gluon),
        GLUON: gluon,
        f"{GLUON}.language": language,
        f"{GLUON}.language.nvidia": SimpleNamespace(hopper=hopper),
        f"{GLUON}.language.nvidia.hopper": hopper,
    }
    module = ModuleType(path.stem)
    vars(module)["range"] = _range
    with patch.dict(sys.modules, stand_ins):
        exec(compile(change(path.read_text()), str(path), "exec"), vars(module))
    return module
