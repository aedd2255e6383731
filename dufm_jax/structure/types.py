"""The types of what is found: a kind, a block of classes of that kind, and a structure of blocks.

`str` of a structure is its name for tables, such as "triangular(4)+DNC(2)"; `Structure.parse` reads
it again.
"""

import dataclasses
import enum
import math
import re

NONE = "none"
_NUMBER = "(?:0|[1-9][0-9]{0,17})"
_NAME = re.compile(rf"(\w+)\(({_NUMBER}(?:,{_NUMBER})*)\)")


class Kind(enum.Enum):
    """The kinds of blocks, by the word in their names, which are

    DNC(m)              m orthogonal classes of equal norm, Definition 1
    orthogonal(m)       m orthogonal classes whose norms differ
    triangular(r)       T_r^T T_r, as in the intermediate layers of the SRG solution, Lemma
                        15, with m = r (r - 1) / 2 classes
    square(4)           the same of the square instead of the complete graph, Figure 5
    line_graph(m,r)     the same of another graph, of m edges and r vertices
    simplex(m)          a simplex equiangular tight frame
    merged(m)           m times the same column
    equiangular(m)      all cosines equal
    strongly_regular(m,k,a,b)  the entries are constant on a graph in which each of the m
                        classes has k neighbours, two neighbours share a and two others
                        share b of them
    symmetric(m,s)      no class differs from another: the entries are constant on the s
                        relations of an association scheme, more than the three of a
                        strongly regular graph
    zero(m)             m columns that vanish
    """

    DNC = "DNC"
    ORTHOGONAL = "orthogonal"
    TRIANGULAR = "triangular"
    SQUARE = "square"
    LINE_GRAPH = "line_graph"
    SIMPLEX = "simplex"
    MERGED = "merged"
    EQUIANGULAR = "equiangular"
    STRONGLY_REGULAR = "strongly_regular"
    SYMMETRIC = "symmetric"
    ZERO = "zero"


# The numbers that a name has behind its first; the other kinds have none.
_FURTHER = {Kind.LINE_GRAPH: 1, Kind.STRONGLY_REGULAR: 3, Kind.SYMMETRIC: 1}


@dataclasses.dataclass(frozen=True)
class Block:
    """Classes that form one of the kinds; `Block.of` makes it from the numbers in its name.

    Attributes:
      kind: Which.
      size: m, the number of its classes, at least 1.
      parameters: What tells it from others of that kind and size, in the order of `of`.
    """

    kind: Kind
    size: int
    parameters: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind is Kind.TRIANGULAR:
            fits = len(self.parameters) == 1 and math.comb(self.parameters[0], 2) == self.size
        else:
            fits = len(self.parameters) == _FURTHER.get(self.kind, 0)
        if not fits or self.size < 1 or (self.kind is Kind.SQUARE and self.size != 4):
            raise ValueError(
                f"a block {self.kind.value} cannot have {self.size} classes and the parameters "
                f"{self.parameters}."
            )

    @classmethod
    def of(cls, kind: Kind, *numbers: int) -> "Block":
        """Returns the block of a kind with the numbers that its name has.

        Args:
          kind: Which.
          *numbers: Those between the brackets of the names that `Kind` lists.

        Raises:
          ValueError: if there is no such block.
        """
        if kind is Kind.TRIANGULAR and len(numbers) == 1:
            return cls(kind, math.comb(numbers[0], 2), numbers)
        return cls(kind, numbers[0] if numbers else 0, numbers[1:])

    def __str__(self) -> str:
        triangular = self.kind is Kind.TRIANGULAR
        numbers = self.parameters if triangular else (self.size, *self.parameters)
        return f"{self.kind.value}({','.join(map(str, numbers))})"

    @property
    def _place(self) -> tuple[int, str]:
        """What orders the blocks of a structure, from the last to the first."""
        return (0 if self.kind is Kind.ZERO else self.size), str(self)


@dataclasses.dataclass(frozen=True)
class Structure:
    """The structure of a Gram matrix; two are equal if their blocks are.

    Attributes:
      blocks: The largest first and what vanishes last; none if no structure fits.
      residual: ||G - S||_F / ||G||_F of the Gram matrix G to this structure S; NaN for no blocks,
        and where it is not known.
    """

    blocks: tuple[Block, ...]
    residual: float = dataclasses.field(default=math.nan, compare=False)

    def __post_init__(self) -> None:
        ordered = sorted(self.blocks, key=lambda block: block._place, reverse=True)
        object.__setattr__(self, "blocks", tuple(ordered))

    @classmethod
    def parse(cls, text: str, residual: float = math.nan) -> "Structure":
        """Returns the structure of a name, as `str` writes it.

        Args:
          text: Such as "triangular(4)+DNC(2)", or "none".
          residual: That of the structure, which the name does not have.

        Raises:
          ValueError: if it is no such name.
        """
        blocks = []
        for part in [] if text == NONE else text.split("+"):
            named = _NAME.fullmatch(part)
            try:
                if named is None:
                    raise ValueError
                blocks.append(Block.of(Kind(named[1]), *map(int, named[2].split(","))))
            except ValueError:
                raise ValueError(
                    f"{part!r} is no block of a structure such as 'DNC(10)' or 'triangular(5)'."
                ) from None
        return cls(tuple(blocks), residual)

    def __str__(self) -> str:
        return "+".join(map(str, self.blocks)) or NONE

    @property
    def classes(self) -> int:
        """The number of classes in its blocks; 0 where nothing fits."""
        return sum(block.size for block in self.blocks)

    @property
    def is_dnc(self) -> bool:
        """Whether all classes form one block DNC."""
        return self._is_one(Kind.DNC)

    @property
    def is_srg(self) -> bool:
        """Whether all form one triangular block, as in the SRG solution's intermediate layers."""
        return self._is_one(Kind.TRIANGULAR)

    def _is_one(self, kind: Kind) -> bool:
        return [block.kind for block in self.blocks] == [kind]
