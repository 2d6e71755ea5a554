"""The page's look and the little it does: no network, both colour schemes, readable from a phone to a wide screen.

The script only shows values under the pointer. All that it shows is in the plots and tables without it too.
"""

from __future__ import annotations

CSS = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2128;--soft:#5b6570;--line:#d5dae0;--panel:#f6f8fa;--warn:#9a5b00;
--warnbg:#fff4de;--k0:#0b63c5;--k1:#c2410c;--k2:#15803d;--k3:#a21caf;--k4:#b91c1c;--k5:#0e7490;--k6:#854d0e;
--k7:#4f46e5;--k8:#be185d;--k9:#57606a}
@media(prefers-color-scheme:dark){:root{--bg:#14181d;--fg:#e4e8ec;--soft:#9aa5b1;--line:#333b45;--panel:#1c2229;
--warn:#f5c26b;--warnbg:#33270f;--k0:#6cb0ff;--k1:#ff9d6b;--k2:#5fd08a;--k3:#e58cf0;--k4:#ff8d88;--k5:#5cc9dd;
--k6:#e0b15e;--k7:#a5a1ff;--k8:#ff8fc0;--k9:#aab4be}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1280px;padding:16px 20px 60px;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}
h1{font-size:22px;line-height:1.25;margin:8px 0 4px}h2{font-size:17px;margin:34px 0 8px}
h3{font-size:15px;margin:16px 0 4px}
small,.soft,.note{color:var(--soft)}.note{font-size:13px;margin:4px 0;max-width:75ch}
.notice{background:var(--warnbg);color:var(--warn);border-radius:6px;padding:8px 12px;margin:10px 0}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:10px;margin:14px 0;padding:0}
.facts div{background:var(--panel);border-radius:6px;padding:8px 12px}
.facts dt{color:var(--soft);font-size:13px}.facts dd{margin:0;font-size:17px;font-variant-numeric:tabular-nums}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,360px),1fr));gap:18px 16px}
.plot{margin:0;position:relative;min-width:0}.plot figcaption{font-weight:600;font-size:14px}
.plot figcaption small{font-weight:400}
svg{display:block;width:100%;height:auto;overflow:hidden}svg text{fill:var(--soft);font-size:11.5px}
.grid{stroke:var(--line);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
.line{fill:none;stroke-width:1.4;stroke-linejoin:round}.many .line{stroke-width:1;opacity:.85}
.dash{stroke-dasharray:5 3}
.cursor{stroke:var(--soft);stroke-width:1;visibility:hidden}
.tip{position:absolute;z-index:1;pointer-events:none;background:var(--bg);border:1px solid var(--line);
border-radius:5px;padding:4px 8px;font-size:12px;line-height:1.35;white-space:nowrap;
font-variant-numeric:tabular-nums;max-width:100%;overflow:hidden}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;list-style:none;padding:0;margin:8px 0;font-size:13px}
.swatch{display:inline-block;width:22px;height:10px;margin-right:6px;vertical-align:0}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:4px 12px 4px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th{color:var(--soft);font-weight:600;white-space:nowrap}td.n,th.n{text-align:right;white-space:nowrap}
td.t{white-space:nowrap}td.w{min-width:220px;max-width:560px;white-space:pre-wrap;overflow-wrap:anywhere}
@media(max-width:600px){td.w{min-width:120px}body{padding:12px 14px 40px}}
.bar{display:flex;height:18px;border-radius:4px;overflow:hidden;background:var(--panel);margin:6px 0 10px;
max-width:900px}
.bar i{display:block;height:100%}.thin .bar,.bar.thin{height:12px;margin:4px 0;min-width:180px}
details{margin:6px 0}summary{cursor:pointer}
pre{background:var(--panel);border-radius:6px;padding:10px 12px;overflow-x:auto;font-size:12.5px;line-height:1.45}
"""

for _index in range(10):
    CSS += f".c{_index}{{--k:var(--k{_index})}}"
CSS += (
    "polyline[class*=c]{stroke:var(--k)}circle[class*=c]{fill:var(--k)}.swatch line{stroke:var(--k);stroke-width:2.5}"
    ".p-training{background:var(--k2)}.p-data{background:var(--k1)}.p-checkpoint{background:var(--k0)}"
    ".p-validation{background:var(--k3)}.p-starting{background:var(--k6)}.p-lost{background:var(--k4)}"
    ".p-stopped{background:var(--k9)}.p-other{background:var(--line)}"
    ".dot{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:7px}"
)

SCRIPT = """
(function(){
var page=JSON.parse(document.getElementById("data").textContent),left=54,right=390,width=400;
function near(steps,x){var a=0,b=steps.length-1;while(b-a>1){var m=(a+b)>>1;if(steps[m]<x)a=m;else b=m}
return x-steps[a]<steps[b]-x?a:b}
document.querySelectorAll(".plot").forEach(function(plot){
var svg=plot.querySelector("svg"),cursor=plot.querySelector(".cursor"),curves=page.curves[plot.dataset.metric],
range=plot.dataset.x.split(",").map(Number),tip=document.createElement("div");
tip.className="tip";tip.hidden=true;plot.appendChild(tip);
function hide(){tip.hidden=true;cursor.style.visibility="hidden"}
svg.addEventListener("pointerleave",hide);
svg.addEventListener("pointermove",function(event){
var box=svg.getBoundingClientRect(),at=(event.clientX-box.left)*width/box.width;
if(at<left||at>right){hide();return}
var step=range[0]+(at-left)/(right-left)*(range[1]-range[0]),found=[];
curves.forEach(function(curve,run){if(curve[0].length){var i=near(curve[0],step);
found.push([curve[0][i],curve[1][i],page.runs[run].name])}});
found.sort(function(a,b){return a[1]-b[1]});
var shown=found.slice(0,8).map(function(f){
return "step "+f[0]+": "+(+f[1].toPrecision(5))+(found.length>1?"  "+f[2]:"")});
if(found.length>8)shown.push("and "+(found.length-8)+" more");
tip.textContent="";shown.forEach(function(line){var row=document.createElement("div");row.textContent=line;
tip.appendChild(row)});
tip.hidden=false;tip.style.top="34px";
var x=event.clientX-box.left,over=x>box.width/2;
tip.style.left=over?"auto":Math.round(x+10)+"px";tip.style.right=over?Math.round(box.width-x+10)+"px":"auto";
cursor.setAttribute("x1",at);cursor.setAttribute("x2",at);cursor.setAttribute("y1",8);cursor.setAttribute("y2",196);
cursor.style.visibility="visible"})})})();
"""
