"""The words of the demo's invented shop: categories, brands, and the parts of its titles."""

from __future__ import annotations

# Department -> group -> leaves, in the order in which they tend to be bought.
CATEGORIES: dict[str, dict[str, tuple[str, str, str, str]]] = {
    "Kitchen": {
        "Tea": ("Kettle", "Teapot", "Infuser", "Canister"),
        "Coffee": ("Grinder", "Percolator", "Filter", "Mug"),
        "Baking": ("Mixer", "Whisk", "Cake Tin", "Cooling Rack"),
        "Cutting": ("Cleaver", "Chopping Board", "Peeler", "Sharpener"),
    },
    "Garden": {
        "Planting": ("Trowel", "Flower Pot", "Seed Tray", "Plant Label"),
        "Watering": ("Hose", "Sprinkler", "Watering Can", "Rain Gauge"),
        "Lawn": ("Mower", "Rake", "Edger", "Grass Bag"),
        "Wildlife": ("Bird Feeder", "Birdhouse", "Bird Bath", "Bee Hotel"),
    },
    "Music": {
        "Strings": ("Guitar", "Tuner", "Capo", "Guitar Strap"),
        "Keys": ("Keyboard", "Piano Stool", "Pedal", "Metronome"),
        "Drums": ("Snare", "Drumstick", "Cymbal", "Practice Pad"),
        "Recording": ("Microphone", "Mic Stand", "Pop Screen", "Audio Cable"),
    },
    "Outdoors": {
        "Luggage": ("Suitcase", "Packing Cube", "Luggage Tag", "Padlock"),
        "Camping": ("Tent", "Sleeping Bag", "Camp Stove", "Lantern"),
        "Hiking": ("Rucksack", "Water Bottle", "Trekking Pole", "Map Case"),
        "Cycling": ("Bicycle", "Helmet", "Bike Lock", "Handlebar Bell"),
    },
    "Desk": {
        "Writing": ("Fountain Pen", "Ink Bottle", "Notebook", "Blotter"),
        "Drawing": ("Easel", "Sketchbook", "Pencil", "Eraser"),
        "Computing": ("Laptop", "Laptop Sleeve", "Charger", "Mouse Mat"),
        "Lighting": ("Desk Lamp", "Light Bulb", "Dimmer", "Extension Cord"),
    },
    "Pets": {
        "Dogs": ("Dog Bed", "Dog Lead", "Chew Toy", "Dog Bowl"),
        "Cats": ("Scratching Post", "Cat Tunnel", "Litter Tray", "Cat Collar"),
        "Fish": ("Aquarium", "Water Pump", "Air Stone", "Fish Net"),
        "Birds": ("Birdcage", "Swing", "Bird Mirror", "Seed Cup"),
    },
}
LEAF_PATHS = [(d, g, leaf) for d, groups in CATEGORIES.items() for g, leaves in groups.items() for leaf in leaves]
# One row per price tier, from cheap to expensive.
BRANDS = (
    ("Zubbly", "Pennok", "Thrimbo", "Wexlet", "Okkadee", "Dobbrin", "Flunt", "Jarrowip"),
    ("Harvemund", "Quistel", "Ombrecht", "Tavvory", "Lindquay", "Esperholt", "Norvick Dale", "Calderune"),
    (
        "Aurelquist",
        "Vantremont",
        "Sorrenhall",
        "Maisonelle Roux",
        "Ebonwrith",
        "Castellane Voss",
        "Oriquent",
        "Zephirine",
    ),
)
TIER_WORDS = (("Basic", "Handy", "Everyday"), ("Classic", "Select", "Plus"), ("Grand", "Master", "Reserve"))
ADJECTIVES = ("Compact", "Slim", "Folding", "Sturdy", "Light", "Quiet", "Large", "Small", "Soft", "Smooth")
MODEL_STARTS = "bal cor dan fen gor hil jun kel lom mar nev pol rin sol tur vel wim zan".split()
MODEL_ENDS = "abo adi ago aka alu ami eno era esu eto ico ido ila onu oru uva".split()
MODEL_WORDS_PER_LEAF = 3  # 96 leaves × 3 = 18 starts × 16 ends: each word belongs to one leaf
