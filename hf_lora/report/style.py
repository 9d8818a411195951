"""How a report looks, in light and dark, wide and narrow; and the little that it does by itself."""

STYLE = """
:root{--paper:#fbfaf8;--card:#fff;--ink:#1c1b19;--soft:#6a675f;--line:#e6e2da;--hot:#c2410c;
--cold:#f1ede5;--good:#15803d;--bad:#b42318;--minus:#1d5fa8;--c0:#c2410c;--c1:#2563a8;--c2:#15803d;
--c3:#8a3ea6;--c4:#a16207;--c5:#0f766e;--shadow:0 1px 2px #0000000d,0 4px 16px #0000000a}
@media (prefers-color-scheme:dark){:root{--paper:#151412;--card:#1e1c1a;--ink:#ece9e2;
--soft:#a09b90;--line:#35322d;--hot:#ff8a4c;--cold:#26231f;--good:#4ade80;--bad:#ff8f82;
--minus:#7ab8ff;--c0:#ff8a4c;--c1:#7ab8ff;--c2:#5fd38a;--c3:#d49af0;--c4:#e8c05a;--c5:#5ed0c5;
--shadow:none}}
*{box-sizing:border-box}html{scroll-behavior:smooth;scroll-padding-top:1rem}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,
"Segoe UI",Roboto,sans-serif;-webkit-text-size-adjust:100%}
header,main,footer{max-width:1080px;margin:0 auto;padding:0 clamp(16px,4vw,40px)}
header{padding-top:clamp(28px,6vw,64px)}
.eyebrow{margin:0;color:var(--hot);font-size:.8rem;font-weight:600;letter-spacing:.08em;
text-transform:uppercase}
h1{margin:.1em 0 .4em;font-size:clamp(1.7rem,5vw,2.8rem);line-height:1.15;letter-spacing:-.02em;
overflow-wrap:anywhere}
h2{margin:0 0 .7rem;font-size:1.3rem;letter-spacing:-.01em}
h3{margin:1.4rem 0 .5rem;font-size:1rem;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:.35rem .5rem;padding-bottom:1.2rem;
border-bottom:1px solid var(--line)}
nav a{color:var(--soft);text-decoration:none;font-size:.86rem;padding:.2rem .65rem;
border:1px solid var(--line);border-radius:99px}
nav a:hover,nav a:focus-visible{color:var(--ink);border-color:var(--soft)}
section{padding:2.2rem 0 .4rem}footer{color:var(--soft);font-size:.82rem;padding-top:2rem;
padding-bottom:3rem}
.lead{max-width:68ch;margin:0 0 1rem;color:var(--soft)}
.cards{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr))}
.card{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:1.1rem 1.25rem;
box-shadow:var(--shadow)}.card h3{margin:0 0 .6rem;font-size:1.05rem}
dl{margin:0;display:grid;gap:0 1.6rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,260px)
,1fr))}dl div{display:flex;justify-content:space-between;gap:1rem;padding:.32rem 0;
border-top:1px solid var(--line)}dt{color:var(--soft);white-space:nowrap}
dd{margin:0;text-align:right;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.key{display:inline-block;width:.7em;height:.7em;border-radius:3px;margin-right:.5em;
background:currentColor}.key.ring{border-radius:50%}
.c0{color:var(--c0);stroke:var(--c0)}.c1{color:var(--c1);stroke:var(--c1)}
.c2{color:var(--c2);stroke:var(--c2)}.c3{color:var(--c3);stroke:var(--c3)}
.c4{color:var(--c4);stroke:var(--c4)}.c5{color:var(--c5);stroke:var(--c5)}
.scroll{overflow-x:auto;margin:0 0 .4rem;padding-bottom:.3rem}
table{border-collapse:separate;border-spacing:0;font-size:.86rem;
font-variant-numeric:tabular-nums}caption{position:absolute;width:1px;height:1px;overflow:hidden;
clip-path:inset(50%)}
th{font-weight:500;text-align:left;color:var(--soft)}
.heat{width:100%;border-spacing:2px}.heat thead th{text-align:center;font-size:.72rem;padding:0}
.heat thead th:first-child{text-align:left}
.heat tbody th,.heat thead th:first-child{width:1%}
.heat tbody th{white-space:nowrap;padding-right:.7rem;position:sticky;left:0;
background:var(--paper)}
.heat td{min-width:12px;height:26px;padding:0;border-radius:4px;text-align:center}
.heat td[style]{background:color-mix(in oklab,var(--hot) calc(var(--v)*100%),var(--cold))}
.heat td.minus[style]{background:color-mix(in oklab,var(--minus) calc(var(--v)*100%),var(--cold))}
.heat td span{position:absolute;clip-path:inset(50%);width:1px;height:1px;overflow:hidden}
.heat.wide{width:auto}.heat.wide tbody th{width:auto}.heat.wide td{width:64px;height:40px}
.heat.wide td span{position:static;clip-path:none;width:auto;height:auto}
.heat.wide td[style] span{background:var(--card);border-radius:5px;padding:.05rem .35rem}
.heat td.dead{background:repeating-linear-gradient(45deg,var(--line) 0 2px,transparent 2px 5px)}
.heat td.now{outline:2px solid var(--ink)}
.readout{min-height:1.5em;margin:0 0 .3rem;color:var(--soft);font-size:.86rem;
overflow-wrap:anywhere}
.scale{display:inline-flex;align-items:center;gap:.5rem;white-space:nowrap}
.scale i{width:110px;height:10px;border-radius:5px;background:linear-gradient(90deg,var(--cold),
var(--hot))}
figure{margin:0}figure>.plot{max-width:760px}.plot{width:100%;height:auto;display:block;overflow:visible}
.plot text{fill:var(--soft);font-size:12px;stroke:none}.plot .end{text-anchor:end}
.plot .mid{text-anchor:middle}.plot .grid{stroke:var(--line);stroke-width:1}
.plot polyline{fill:none;stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
.plot polyline.dots{stroke-dasharray:2 5;stroke-width:1.6}.plot circle{fill:var(--paper);
stroke-width:2.2}
.panels{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr))}
.panel{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:.9rem 1rem;
box-shadow:var(--shadow)}.panel .plot text{font-size:21px}
figcaption{display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;margin-bottom:.5rem;font-size:.84rem;
color:var(--soft)}figcaption b{color:var(--ink);width:100%}
figcaption>span{display:flex;align-items:center}
.bar{display:inline-block;width:54px;height:7px;border-radius:4px;background:var(--cold);
margin-left:.5rem;overflow:hidden;vertical-align:middle}.bar i{display:block;height:100%;
background:currentColor;border-radius:4px}
ul{padding-left:1.1rem}.plain,.legend{list-style:none;padding:0;margin:.6rem 0 0}
.plain li{padding:.15rem 0;overflow-wrap:anywhere}.legend{display:flex;flex-wrap:wrap;
gap:.2rem 1.2rem;font-size:.86rem;color:var(--soft)}
.mono{font-family:ui-monospace,Consolas,monospace;font-size:.84rem;overflow-wrap:anywhere}
.good{color:var(--good)}
.sizes{width:100%}.sizes th,.sizes td{padding:.3rem .8rem .3rem 0;border-top:1px solid var(--line);
white-space:nowrap}.sizes td{text-align:right}.sizes .stretch{width:45%}
.sizes .bar{width:100%;height:9px;margin:0}
.clients th,.clients td{padding:.45rem 1.2rem .45rem 0;border-top:1px solid var(--line);
vertical-align:top}.clients thead th,.clients thead td{border:0}.clients tbody th{color:var(--ink)}
.yes{color:var(--good)}.yes span{color:var(--soft)}.no summary{color:var(--bad);cursor:pointer}
.no{max-width:30rem}.no ul,.no p{margin:.3rem 0;color:var(--soft)}
@media (max-width:560px){.plot text{font-size:20px}
.heat td{min-width:11px;height:22px}.heat tbody th{font-size:.78rem}
.sizes .stretch{display:none}.sizes th{white-space:normal}}
@media print{nav,.readout{display:none}.card,.panel{break-inside:avoid;box-shadow:none}}
"""

SCRIPT = """
for (const table of document.querySelectorAll('table.heat:not(.wide)')) {
  const words = table.parentElement.nextElementSibling;
  let now = null;
  table.addEventListener('pointerover', event => {
    const cell = event.target.closest('td[title]');
    if (!cell) return;
    if (now) now.classList.remove('now');
    now = cell;
    cell.classList.add('now');
    words.textContent = cell.title;
  });
}
"""
