"""Operations that a per-channel map passes through, one file each, found by walking this package."""
