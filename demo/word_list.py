"""The words that the demo model can spell: each is one token after a space, so it must be seen to be known."""

WORDS = tuple(
    """
    actor address adventure airport angle angry answer ant apartment apple arm army attention autumn avenue baby bad
    bag balance ball balloon banana bank basket battery beach bear beautiful bed bee belt berry bias big bike
    biology bird bitter black blanket blood blue boat bone book boot border bottle bowl box brain branch bread break
    breakfast bridge bright bring brother brown bubble buffer build bus butter butterfly button buy cabinet cache
    cake calendar camel camera candle candy captain car carbon carpet carrot castle cat catch center century chain
    chair chapter charity cheese chemistry cherry chess chicken child chocolate church circle city clean climate
    climb clock close cloud coat coffee coin cold college color colour comfort committee computer concert contract
    cook cookie cool corner cotton country cow cream cry crystal culture cup curtain customer cut dance danger dark
    daughter day deep deer degree desert different difficult digit dinner dirty doctor dog dollar dolphin door
    drawer dream dress drink driver drum dry duck eagle ear earth easy eat economy egg election elephant empty
    energy engine engineer evening evidence exercise experience expert eye face factory family farmer fast father
    feel fence festival fiction field figure finance finger fire fish flag floor flower fly foot force forest fork
    fortune fox friday friend frog full future gallery game garden garlic gesture giant gift give glass glove goal
    goat gold good goose government gradient grammar grape grass gray green guitar hair hammer hand happy hard
    harvest hat head hear heart heavy hello helmet hero high hill history hobby holiday honey honor horizon horse
    hospital hot hotel hour house hungry hunter image important industry insect iron island jacket java jelly jewel
    journey judge juice jump kernel key keyboard king kingdom kitchen knee knife know ladder lake lamp language
    laugh law lawyer layer leaf learn lecture leg legend leisure lemon lesson letter liberty library light line lion
    listen lock long look loud low machine magazine magnet man manager mango marble market mason matrix meat medal
    melon memory metal milk minister minute mirror mission model monday money monkey month moon morning mother
    mountain mouse mouth movie museum music mystery nail nation nature necessary neck needle network new night nose
    novel number nurse object ocean office oil old onion open opera orange oxygen package page painter palace paper
    parade parallel parent partner passage pasta patient pattern peace peach pear pen pencil pension people pepper
    person phone piano picture pig pillow pilot pink pioneer pizza plane planet plastic plate play player plum
    pocket poem poet point policy poor portrait potato poverty power president price prince princess prison prize
    profit project protein proverb pull purple push puzzle python quality quarter queen question quiet rabbit race
    radio rain rainbow read reason recipe record red region religion remedy result reward rhythm rice rich ring
    river road robot rocket roof root rope ruby run rust sad saddle salad salt sample sand savage scandal scarf
    scholar school science screen sea season second secret see seed sell send sentence server shadow shape shark
    sheep shelter ship shirt shoe short shoulder signal silence silver sing singer sister sit sketch skin sky sleep
    slow small smell smile snake snow society soft soldier song sound soup speak spider spirit spoon spring square
    stand star station statue stone storm story strawberry street strong student success sugar summer sun sunday
    surgeon surprise sweet swift swim symbol table take talent tall teach teacher team television temple tensor
    theory think throw thunder ticket tiger tired today together token tomato tomorrow tongue tool tooth touch tower
    toy tradition traffic train treasure tree triangle tribute trouble truck tunnel turtle twin uncle union universe
    vacuum valley vector vehicle victory village violin virus vision voice voyage wake walk wall war warm watch
    water weak wealth weapon wedding week weight wet whale wheel whisper white wide wind window winter wisdom
    witness wolf woman wonder wood word work world write writer year yellow yesterday young zebra zero
    """.split()
)
