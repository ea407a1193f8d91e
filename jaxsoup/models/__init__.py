"""Models in Flax nnx, small enough to read in one sitting."""

from jaxsoup.models._pretrained import convert as convert
from jaxsoup.models._pretrained import load as load
from jaxsoup.models._pretrained import params_of as params_of
from jaxsoup.models._pretrained import save as save
from jaxsoup.models.vit import ViT as ViT
