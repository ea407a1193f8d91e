"""Data as dicts: `image` [N, H, W, C] in 0..1 or uint8, `label` int32 [N]."""
