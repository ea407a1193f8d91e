"""Data as dicts: `image` float32 [N, H, W, C] in 0..1, `label` int32 [N]."""
