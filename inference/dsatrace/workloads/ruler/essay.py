"""A text of our own to hide needles in, for when the user names no haystack file.

About two hundred sentences on keeping a workshop, a garden and a notebook, without a
single digit, so that no number in it can be taken for a needle. Longer haystacks repeat
it in another order; knows no task.

    ESSAY.split(". ")
"""

from __future__ import annotations

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
