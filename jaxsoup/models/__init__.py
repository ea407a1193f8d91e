"""Models in Flax nnx, small enough to read in one sitting.

```
from jaxsoup import models

model = models.load('vit-base-patch16-224/')          # from files of others
model = models.ViT((32, 32, 3), 10, patch_size=4, rngs=nnx.Rngs(0))
models.params_of(model)                               # what a soup averages
```
"""

from jaxsoup.models import batch_norm as batch_norm
from jaxsoup.models import bert as bert
from jaxsoup.models import clip as clip
from jaxsoup.models import efficientnet as efficientnet
from jaxsoup.models import resnet as resnet
from jaxsoup.models import t5 as t5
from jaxsoup.models import vit as vit
from jaxsoup.models._pretrained import convert as convert
from jaxsoup.models._pretrained import load as load
from jaxsoup.models._pretrained import params_of as params_of
from jaxsoup.models._pretrained import save as save
from jaxsoup.models.bert import Bert as Bert
from jaxsoup.models.clip import CLIP as CLIP
from jaxsoup.models.efficientnet import EfficientNet as EfficientNet
from jaxsoup.models.resnet import ResNet as ResNet
from jaxsoup.models.t5 import T5 as T5
from jaxsoup.models.vit import ViT as ViT
