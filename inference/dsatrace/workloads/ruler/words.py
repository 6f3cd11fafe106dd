"""Plain English words of our own choosing, for keys ("brisk-anchor") and for word lists.

No word is part of another, so that a score by substring cannot confuse two of them.
Knows no task.

    words(draw)          # all of them, shuffled, for a `random.Random`
    word_pairs(draw)     # "adjective-noun", no pair twice, more than 126,000 of them
"""

from __future__ import annotations

import random
from collections.abc import Iterator

_ADJECTIVES = """\
ample ancient arid austere bashful bland blissful blunt bold brave brief bright brisk broad bronze busy
calm candid careful cautious cheerful chilly civic clever clumsy coastal compact cordial costly cosy
crimson crisp curious curved daily damp daring decent deft dense devout distant docile double dreamy dusty
eager earnest eastern elastic elegant endless even exact faint famous fancy fertile fierce filmy final
firm fluent foggy formal fragile frank frosty frugal furry gaunt gentle genuine giant gifted glad glossy
golden graceful grand grateful greasy grey handy happy hardy harsh hasty hearty heavy helpful hidden
hollow honest humble humid hungry idle jagged jolly jovial joyful keen kind lanky lavish lawful lazy level
lively local lofty lonely loyal lucid lunar lush magnetic maroon mature meek mellow merry mighty mild
misty modest moist molten muddy musical mute narrow nasal native neat nervous nimble noble noisy northern
novel numb obscure odd opaque orderly ornate oval patient peaceful perky placid plain plump polite
portable proud prudent punctual purple quaint quick quiet rapid rare ready regal remote restless robust
rocky round royal rugged rural rustic sacred sandy scarlet secret serene serious sharp shiny shy silent
silky simple sincere sleepy slender slim smooth snug sober soft solar solemn solid southern spare spicy
steady sticky stout strict sturdy subtle sudden sunny supple sweet swift tacit tactful tall tame tender
tepid thirsty thorough thrifty tidy tiny tired tough tranquil tropical trusty upright urgent useful vague
valiant vast velvet verbal vibrant vivid warm wary watchful weary western wide wild windy wise witty
wooden woolly worthy young zealous zesty
"""

_NOUNS = """\
acorn acrobat almond anchor ankle antler anvil apple apricot apron archer armchair atlas autumn badger
bagpipe bakery balcony ballad balloon bamboo banjo banner barge barley barometer barrel basin basket
beacon beaver beehive beetle bell bench berry bicycle birch biscuit bishop blanket blossom boat bonnet
border bottle boulder bowl bracelet brick bridge broom bucket buffalo bugle bulb butter button cabbage
cabin cactus camel camera candle canoe canyon captain caravan carbon carpet carrot carton castle cavern
cellar cello chain chalk chapel cherry chess chestnut chimney chisel cider cinema circus clarinet cliff
clock cloud clover coal cobbler coconut coffee comet compass copper coral cork cottage cotton cradle crane
crater crayon cricket crown crystal cucumber cupboard curtain cushion cyclone dagger daisy dancer deer
desert diamond dolphin donkey dove dragon drawer drum duck dune eagle echo elbow elephant ember emerald
engine envelope estuary eyebrow falcon farmer feather fence fern ferry festival fiddle fig finch finger
flag flame flannel flask fleet flint flute forest fork fossil fountain fox freckle friar frog furnace
gadget galaxy garden garlic gazebo geyser ginger giraffe glacier globe glove goat goblet goose gorge
granite grape gravel grocer guitar gull hammer hammock harbour harvest hawk hazel hedge helmet herald
hermit heron hinge honey horizon hornet hostel hurdle iceberg igloo ink island ivory ivy jacket jar
jasmine jelly jewel jigsaw jockey journal judge jug jungle kayak kennel kernel kettle kitten kiwi knapsack
knight knot ladder lagoon lamp lantern lark lattice laundry lavender lawn leaf ledger lemon lentil leopard
library lichen lighthouse lilac linen lion lizard lobster locket locust loom lotus lynx magpie mallet
mango mantle maple marble marina market marsh mason meadow medal melon mermaid meteor miller mint mirror
mitten molar monsoon moose moss moth mountain muffin mural museum mustard napkin nectar needle nettle
nickel nomad notebook nutmeg oak oasis oboe ocean olive onion opal orange orbit orchard organ osprey oven
oyster paddle pagoda palace panther papaya parade parcel parrot parsley pasture patrol pavement peach pear
pebble pelican pencil pepper piano picnic pigeon pillow pilot pine pistachio planet plateau plaza pocket
pond pony poplar poppy porch porridge potter prairie prism pudding puffin pulley pumpkin puppet purse
pyramid quail quarry quilt rabbit radish raft railway rainbow raisin ravine razor reef ribbon rice river
robin rocket rooftop rope rosemary rudder ruler saddle saffron sailor salmon sapphire satchel saucer scarf
school scooter sculptor seagrass shadow shawl shelf shepherd shovel shutter signal silver skater sketch
sledge slipper snail sofa sparrow spider spinach spiral sponge spruce squirrel stable staircase statue
steeple stool stork strudel summit sundial swallow swan syrup tablet tailor tambourine tangerine teapot
telescope temple terrace theatre thicket thimble thistle thunder thyme ticket tiger timber toast tomato
torch tortoise tower tractor tram treasure trellis trolley trombone trout trumpet tulip tundra tunnel
turban turnip turret turtle twig umbrella uncle unicorn vase vault verse village vineyard violin volcano
voyage waffle wagon walnut walrus warbler wardrobe wasp waterfall weasel weaver wharf wheat wheel whistle
wicket willow window winter wolf wren yacht yarn yeast zebra zinc zither
"""

ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())
NUM_WORDS = len(ADJECTIVES) + len(NOUNS)
NUM_PAIRS = len(ADJECTIVES) * len(NOUNS)


def words(draw: random.Random) -> Iterator[str]:
    """Every single word once, in an order drawn at random."""
    return iter(draw.sample(ADJECTIVES + NOUNS, NUM_WORDS))


def word_pairs(draw: random.Random) -> Iterator[str]:
    """Every "adjective-noun" once, in an order drawn at random."""
    seen = set[int]()
    while len(seen) < NUM_PAIRS:
        pair = draw.randrange(NUM_PAIRS)
        if pair in seen:
            continue
        seen.add(pair)
        adjective, noun = divmod(pair, len(NOUNS))
        yield f"{ADJECTIVES[adjective]}-{NOUNS[noun]}"
