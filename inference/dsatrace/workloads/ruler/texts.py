"""Every sentence and word that a RULER prompt is made of, in our own words but of NVIDIA's structure.

Noise unit, needle and assignment are the benchmark's own forms, since they must be found in
its files too. Instructions, questions and answer prefixes are ours: compare scores on
generated prompts with each other, not with published ones; for those read NVIDIA's files.
A function of a family gives its prompt and its answer prefix; the reader uses them to
complete rows that bring only a context and a query.

    prompt, answer_prefix = niah("number", context, "brisk-anchor", plural=False)
    words(draw)          # all words, shuffled by a `random.Random`; none is part of another
    word_pairs(draw)     # "adjective-noun", no pair twice, more than 126,000 of them
    ESSAY                # a text to hide needles in, without a digit
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from dsatrace.workloads.ruler.example import ValueKind

# One line of filler: five short sentences, 24 DeepSeek tokens with its newline.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

Parts = tuple[str, str]


def needle(kind: ValueKind, key: str, value: str) -> str:
    return f"One of the special magic {kind}s for {key} is: {value}."


def chain(names: Sequence[str], value: str) -> list[str]:
    """The lines of one chain of assignments: the value goes from each name to the next."""
    sources = (value, *(f"VAR {name}" for name in names))
    return [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=False)]


def enumeration(keys: Sequence[str]) -> str:
    """'a', 'a, and b', 'a, b, and c': as NVIDIA's rows name their keys."""
    return keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"


def niah(kind: str, context: str, query: str, plural: bool) -> Parts:
    """`query` names the keys; `plural` when more than one value is to be found."""
    hidden = f"Some special magic {kind}s are" if plural else f"A special magic {kind} is"
    asked = f"What are all the special magic {kind}s" if plural else f"What is the special magic {kind}"
    prompt = (
        f"{hidden} hidden in the text below. Read it with care, for I will ask about it at the end.\n"
        f"{context}\n{asked} for {query} given in the text above?"
    )
    subject, verb = (f"{kind}s", "are") if plural else (kind, "is")
    return prompt, f" The special magic {subject} for {query} given in the text above {verb}"


def vt(context: str, value: str, num_names: int = 5) -> Parts:
    prompt = (
        "Follow the variable assignments hidden in the text below, from one variable to the next.\n\n"
        f"{context}\nQuestion: Which variables in the text above hold the value {value}?"
    )
    return prompt, f" Answer: In the text above, {num_names} variables hold the value {value}, namely:"


def cwe(context: str, num_common: int = 10) -> Parts:
    prompt = (
        "Here is a numbered list of words, and some of them occur more often than others. "
        f"Remember the most frequent ones.\n{context}\n"
        f"Question: Which {num_common} words occur most often in the list above?"
    )
    return prompt, f" Answer: The {num_common} words that occur most often in the list are:"


def fwe(context: str) -> Parts:
    prompt = (
        "The text below is written in coded words. Count them, and find the three that occur most "
        f"often. {context}\nQuestion: Without any explanation, and leaving the dots '...' aside: "
        "which three coded words occur most often in the text above?"
    )
    return prompt, " Answer: The three coded words that occur most often in the text above are:"


def qa(context: str, question: str) -> Parts:
    task = "Answer the question from the documents {place}. Give the answer alone, without other words."
    prompt = (
        f"{task.format(place='below')}\n\n{context}\n\n{task.format(place='above')}\n\nQuestion: {question}"
    )
    return prompt, " Answer:"


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


# Without a digit, so that no number in it can be taken for a needle.
ESSAY = """\
A workshop teaches patience before it teaches anything else. The bench is never quite level, the light is
never quite right, and the wood always has an opinion of its own. People who begin with a grand plan tend
to end with a pile of shavings. People who begin with one straight board tend to end with a chair. It took
me years to see that the second group were not less ambitious. They had merely moved their ambition from
the picture in the head to the edge under the hand. An edge can be checked, and a picture cannot.

Sharpening is the part nobody wants to hear about. A dull chisel looks exactly like a sharp one from across
the room. The difference shows only when the grain turns against you. Then the dull tool tears, and you blame
the timber. My neighbour keeps his stones in a tray of water by the door, so that he passes them on the way
in. He says a habit needs a doorway. I have stolen that sentence and used it for many other things.

Measuring is a form of listening. You hold the rule against the work and wait for it to tell you something.
Most mistakes are made by people who already know the answer. They read the number they expected and cut.
A good trick is to measure from the wrong end and see whether the two stories agree. When they do not, one
of them is lying, and it is rarely the wood. Marking with a knife is better than marking with a pencil. A
pencil line has two sides, and the saw will always choose the other one.

There is a pleasure in mending that making does not have. When you make a thing, you meet only yourself.
When you mend it, you meet whoever made it first. Somebody hid a crooked joint behind a strip of veneer, and
now you are the only two people in the world who know. Old glue smells of kitchens. Old screws are rarely
alike, even in the same hinge. I keep a jar of them, sorted by nothing at all, and it has never failed me.

The garden behind the workshop is narrow and steep. Water runs straight down it unless something persuades
it to stay. So the first thing we built was a set of low walls, each no higher than a knee. Behind every
wall the soil is a little deeper than it has any right to be. Beans like the upper terrace, where the wind
keeps the flies away. Pumpkins prefer the bottom, where everything that was washed down has come to rest.
Lettuce goes wherever there is shade, and complains about it.

Compost is the slowest machine I own. You feed it scraps and it answers in seasons. It must not be too wet
or too dry, and it wants turning when you least feel like turning it. The reward looks like nothing much.
It crumbles, it smells of rain, and it makes every other thing in the garden easier. I have come to think
of reading in the same way. Most of what goes in disappears. What comes out does not resemble any of it.

Pruning feels like an insult to the tree until the following summer. Then the light reaches the middle, the
fruit hangs where a hand can find it, and the tree looks younger than before. My aunt pruned everything,
including her letters. She would write a page, cross out the middle, and post what was left. Her friends
said that nobody wasted less of their time. I have kept all of hers in a biscuit tin. The crossed out parts
can still be read if you hold them up to a window.

Weeds are only plants with bad timing. The ones with deep roots should be pulled after rain. The ones with
shallow roots should be cut before noon on a dry day and left where they fall. Some of them turn out to be
worth keeping. A purple one came up beside the gate and stayed because nobody had the heart to move it. Now
visitors ask for its name. We have invented several.

I started the notebook because I kept solving the same problem. Every spring the pump refused to start, and
every spring I took it apart to learn why. The first entry says only that the little valve goes in with the
flat side down. It is not literature, but I have read it more often than any novel. After a while the
notebook collected other things. It has the depth of the well, the colour of the shutters, and the name of
the man who knows about chimneys. It also has a list of questions, which is longer.

Writing a thing down changes what you see. Before the notebook, the swallows simply came. Now they come
early or late, and I have an opinion about it. The frost has a character, and so has the road. Even the
silence in the evening has been sorted into kinds. There is the silence before snow, the silence after
guests, and the silence of a machine that has just stopped when it should not have. A page with a date on it
is a small bridge. You can walk back over it and stand where you stood.

The best notes are short and a little ashamed of themselves. They say what was tried and what went wrong.
They do not explain why the writer is clever. I once bought a box of papers at a sale because I wanted the
box. The papers belonged to a surveyor who had spent his life drawing the same valley. On every sheet, in a
corner, he had written what he was not sure of. The valley has changed since then. His doubts are still
correct.

Maps flatter the people who draw them. They suggest that someone stood high enough to see everything. In
truth the map was made by walking, and the walker had wet feet. A path on the paper is a promise that
another person got through. I like the old ones with sea monsters, because they admit where the knowledge
ends. A modern map goes white instead, which looks like confidence. When I plan a route now, I draw the sea
monsters in myself.

Walking is the only way of travelling that leaves room for thought. A train thinks for you. A bicycle asks
for all your attention and then rewards you with a hill. On foot the mind runs a little ahead, like a dog,
and comes back with things. Some of them are worth keeping. I have found the ends of several stories on the
lane between the mill and the chapel. I have also lost a good pair of gloves there, so the account is even.

The mill has not turned for as long as anyone remembers. The wheel is still there, green and heavy, and
ducks raise their young between the paddles. A committee meets about it every winter. Some want to restore
it, some want to make it into rooms, and some come because the hall is warm. The miller's ledger hangs
behind glass by the door. It shows that he was paid in flour more often than in coin. It also shows that he
forgave most of what he was owed in the year of the flood.

Bread is an argument between time and heat. You can win it quickly, and the loaf will be dull. You can let
it run overnight, and something like flavour appears from nowhere. The dough should feel like the lobe of an
ear, my grandmother said, and then she would check her own to be certain. She never owned a scale. Her cups
were all different, but they were always the same cups. I think that is the whole secret of measuring. It
does not matter what the unit is, as long as it stays.

An oven has corners, like a family. One of them is always too hot, and everyone knows which. You learn to
turn the tray without thinking about it. On the first day of the fair the baker lights both ovens and sleeps
on the flour sacks. His apprentices say that he talks about weather in his sleep. The queue goes around the
fountain. People who have not spoken since the last fair discover that they have nothing to be angry about.

Clocks are honest only in company. A single clock may say anything it likes. Two clocks begin to quarrel,
and with three you can take a vote. The man who repairs them works in a room with more than I could count,
and none of them agree. He does not mind. He listens for the one that hesitates. A clock that is always late
is nearly as good as one that is right, he says, because you can subtract. The trouble is the clock that is
sometimes late.

He taught me how to take a mechanism apart without losing any of it. You lay each piece on a cloth in the
order in which it came off. You do not tidy. You draw what you see before you touch it, even if you think
that you will remember. Then you clean one piece, only one, and put it back in its place on the cloth. It
looks slow to anyone watching. It is slow in the way that a bridge is slow compared with jumping.

Letters used to arrive with weather on them. A wet envelope told you about the road, and a creased one told
you about the bag. My correspondent on the island wrote in pencil because ink froze. She kept goats and a
barometer. Her letters began with the pressure and ended with the goats, and everything that mattered lay
between the two. Once there was no letter for a whole winter. In spring they came all at once, in the wrong
order, and I read her thaw before her storms.

I answered in ink, to show that we had summer. It is strange how much one can learn about a person who only
describes the sky. She was cautious, because she never called a day fine before evening. She was fair,
because she always gave the other side of a wind. When at last I crossed over to meet her, we had nothing to
say to each other, and it was very comfortable. We mended a gate. The goats were exactly as described.

The library in our town is above the fire station. Nobody planned it that way. The books moved in after a
leak, the firemen were away, and by the time they returned the catalogue had been sorted. Readers learn to
keep a finger on the line when the bell goes. The librarian has a theory that people choose braver books up
there. She lends without a limit and fines nobody. Most things come back. Those that do not, she says, must
have been needed.

I borrow the same atlas every autumn. It shows countries that have since changed their minds. Somebody
before me pressed a leaf between two oceans, and it has left a shape like a third continent. Children are
told that it is an island nobody has reached. I see no reason to correct them. The oldest of them has begun
to draw a harbour on its southern coast. The harbour is well placed and sheltered from the north.

Rain is the great editor of plans. It strikes out the picnic and keeps the conversation. It finds the hole
in the roof that three experts could not. When it rains for a week, the village becomes one long porch.
People sit where they can see each other and work on small things. Baskets get finished in such weeks, and
so do quarrels. When the sun returns everyone is a little shy, as if they had been overheard.

Snow does the opposite. It takes the roads away and gives every house its own country. You learn which of
your habits were yours and which belonged to the road. I shovel a path to the workshop even when there is
no work. The path matters more than the place it leads to. Tracks cross it in the night, made by something
light that walks in a straight line. I have never seen it, and I have stopped setting traps for an answer.

A tool wants to be lent. Kept on its hook, it forgets what it is for. Our street owns one long ladder, two
barrows and a press for apples, and nobody can say to whom they belong. They move from house to house by a
rule which no one has written down. If you need the ladder, you look up. Whoever has a clean gutter has had
it last. The press follows the wasps. The barrows are always at the bottom of the hill.

Teaching is mostly a matter of standing in the right place. Too close, and the pupil watches your face. Too
far, and the pupil watches the clock. My own teacher stood at the window and described what he could hear.
That joint is too tight, he would say, looking at the street. He could tell a split from a squeak, and a
sigh from a doubt. When he was silent we knew that the work was good. I have tried to learn silence from
him, and find it harder than dovetails.

At the end of the day I sweep, because a clean floor is a message to the morning. The broom was here before
me. Its handle is worn in two places, and neither of them fits my hands. Whoever used it was taller, and
swept towards the door. I sweep towards the window, for the light. Between us we have covered the whole
floor. It is not a bad way to think about work in general. You take up what is leaning against the wall, you
go over the part that you can reach, and you leave the handle a little smoother than it was.
"""
